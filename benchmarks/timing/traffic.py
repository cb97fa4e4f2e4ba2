"""The bytes that each GPU kernel reads and writes, by tensor: what kernels.py, usage.json and model.py count."""


def traffic(elements: int, activation: int, history: int, rows: int) -> dict[str, dict[str, int]]:
    """Every input once and every output once, without what is small (statistics, sums, coefficients). Names as in
    kernel_cases. elements: of all samples; activation, history: bytes of one number; rows: swept of the history."""
    e, b, wide, swept = elements, activation * elements, 4 * elements, rows * history * elements
    moved = {"history": swept, "z": wide, "x": b, "r": b}
    return {
        "norm_relu": {"y": b, "out": b},
        "norm_tail": {"y": b, "shortcut": b, "out": wide},
        "norm_relu_vjp": {"grad": b, "y": b, "grad_y": b},
        "norm_tail_vjp": {"grad": wide, "y": b, "shortcut": b, "grad_y": b, "grad_shortcut": wide},
        "tail + residual": {"y": b, "shortcut": b, "z": wide, "row": history * e},
        "residual of total": {"grad": b, "grad_shortcut": wide, "constant": wide, "z": wide, "row": history * e},
        "gram_row": {"history": swept},
        "rule": {},
        "combine": moved,
        "cluster_step": moved,
    }
