"""Mutants that survive and may: (path, line before, line after) -> why no test can, or need, tell them apart."""

EQUIVALENT: dict[tuple[str, str, str], str] = {
    (
        "asft_kernels/models/check.py",
        "return 2 * logit + fp32_unit * (logits.shape[-1] ** 0.5 + 2 * at_head.fused.double().abs())",
        "return 2 * logit + fp32_unit * (logits.shape[-1] ** 0.5 + 1 * at_head.fused.double().abs())",
    ): "a bound on rounding: no model can be made to err by between one and two of the last roundings",
    (
        "asft_kernels/batch.py",
        "ends = ends.index_fill(0, borders[1:], True)[1:]",
        "ends = ends.index_fill((-1), borders[1:], True)[1:]",
    ): "the last dimension of one is the first",
    (
        "asft_kernels/sequence.py",
        "if self.nll_sum is None or self.nll_length is None:",
        "if self.nll_sum is None and self.nll_length is None:",
    ): "both are given or neither is",
}
