"""Names of what takes memory, and what shrinks each."""

Terms = dict[str, int]

ACC, FIGURES = "accumulators of dH", "accumulators of figures"
EXPS, WORKSPACE = "cached exponentials", "chunk of exponentials"
ROWS, SCALED = "rows of hidden", "rows of hidden, scaled"
LABELS, UPCAST, SCALES = "rows of labels", "upcast rows of the head", "scales of the codes"
STRIP, TILES, OPERANDS = "strips of logits", "sums of tiles", "operands in fp32"
GRAD_HIDDEN, GRAD_HEAD, GRAD_LOW_RANK = "gradient of hidden", "gradient of the head", "gradient of the adapter"
ROUNDING = "rounding of the head's gradient"
STREAM, GRAD_STREAM = "rows of other ranks", "gradient on its way to them"
VECTORS = "numbers of each token"

_BATCH = "fewer tokens a call: a smaller batch, shorter answers"
ADVICE = dict.fromkeys(
    (ACC, FIGURES, ROWS, SCALED, LABELS, STRIP, GRAD_HIDDEN, VECTORS), _BATCH + " (gradient accumulation)"
) | {
    EXPS: "a smaller cache_bytes; what is not kept is recomputed, at one more product at most",
    **dict.fromkeys((WORKSPACE, UPCAST, TILES, OPERANDS, STREAM, GRAD_STREAM), "a smaller chunk_size"),
    SCALES: "a head that is not quantised",
    GRAD_HEAD: "a frozen head (requires_grad_(False)), or LoRA on it",
    GRAD_LOW_RANK: "a smaller rank of the head's adapter, or none on it",
    ROUNDING: _BATCH,
}
