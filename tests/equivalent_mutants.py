"""Mutants that survive and may: (path, line before, line after) -> why no test can, or need, tell them apart."""

EQUIVALENT: dict[tuple[str, str, str], str] = {
    (
        "asft_kernels/models/check.py",
        "return 2 * logit + fp32_unit * (logits.shape[-1] ** 0.5 + 2 * at_head.fused.double().abs())",
        "return 2 * logit + fp32_unit * (logits.shape[-1] ** 0.5 + 1 * at_head.fused.double().abs())",
    ): "a bound on rounding: no model can be made to err by between one and two of the last roundings",
    (
        "asft_kernels/core/batch.py",
        "ends = ends.index_fill(0, borders[1:], True)[1:]",
        "ends = ends.index_fill((-1), borders[1:], True)[1:]",
    ): "the last dimension of one is the first",
    (
        "asft_kernels/core/sequence.py",
        "if self.nll_sum is None or self.nll_length is None:",
        "if self.nll_sum is None and self.nll_length is None:",
    ): "both are given or neither is",
    (
        "asft_kernels/token_loss.py",
        "return weights.where(counts.index_select(0, row) | weights.isfinite(), 0)",
        "return weights.where(counts.index_select((-1), row) | weights.isfinite(), 0)",
    ): "the last dimension of one is the first",
    (
        "asft_kernels/kernels/settle.py",
        "BLOCK_M=32, BLOCK_T=32, BLOCK=128, num_warps=4 if tile_width <= 256 else 8,  # those of strips spill with 4",
        "BLOCK_M=32, BLOCK_T=32, BLOCK=128, num_warps=5 if tile_width <= 256 else 8,  # those of strips spill with 4",
    ): "the interpreter has no warps; tests/test_compile.py compiles the kernel, and 5 is an error there",
    (
        "asft_kernels/kernels/device_math.py",
        "small = tl.abs(x) < 0.5",
        "small = tl.abs(x) <= 0.5",
    ): "at the border both forms are right to rounding",
    (
        "asft_kernels/kernels/logit_strips.py",
        "has_room = v < (width + 15) // 16 * 16  # of the products, too",
        "has_room = v < (width + 15) // 15 * 16  # of the products, too",
    ): "reads past a strip what is masked afterwards: a GPU's memory checker would see it, the interpreter cannot",
    (
        "asft_kernels/kernels/row_statistics.py",
        "others = tl.load(others_ptr + m, mask=is_token, other=0.0)",
        "others = tl.load(others_ptr + m, mask=is_token, other=1.0)",
    ): "of tokens that are not there, whose results are not stored",
}
