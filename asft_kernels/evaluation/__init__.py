"""Models held against preference pairs, and against each other: `asft eval`.

answers (scores and generated answers of one model, on disk as they come) -> figures (numbers of each pair) ->
summary (means, standard errors, differences pair by pair) -> report (report.md, report.json, pictures); run puts them
together.
"""
