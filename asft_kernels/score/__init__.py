"""Log-probabilities of preference pairs under reference models, once, ahead of training: `asft score`.

scoring (one model, batch by batch) -> unfinished (rows so far, on disk) -> table (Parquet files, and
`load_scores` and `mean_avg_logps` for those who train with them); run puts them together.
"""
