"""What cuDNN computed on GPUs and others have printed: numbers, and what they are numbers of.

In all of these calls every number of a kind is the same: each weight is `weight`, each number of
x, h0 and c0 is 1 (or `state`), each incoming gradient is 1. So they can be written down, and so
can their results, as sums over whole tensors or as one number for each step.

Numbers stand here as they were printed: the last digit says how far they can be off.
"""

from dataclasses import dataclass, field
from decimal import Decimal

import torch
from cases import Case, Results
from torch import Tensor, nn


@dataclass(frozen=True)
class Published:
    """A call and its results.

    Attributes:
        source: who published them.
        case: the call.
        weight: every number of w_ih and w_hh.
        bias: every number of b_ih, and of b_hh.
        tolerance: the publisher's own, of the size of a result. 0: integers.
        sums: of a tensor of `evaluate`'s, or of several: "y + h_n"; "dw" has all parameters.
        steps: of a tensor, `T` numbers, or of two directions `T` pairs; they hold for every
            sequence of the batch (up to its length) and every unit.
        state: every number of h0 and c0.
    """

    source: str
    case: Case
    weight: float
    bias: tuple[float, float]
    tolerance: float
    sums: dict[str, str] = field(default_factory=dict)
    steps: dict[str, tuple[str | tuple[str, str], ...]] = field(default_factory=dict)
    state: float = 1.0

    def __str__(self) -> str:
        return f"{self.source}-{self.case}".replace(" ", "_")

    @property
    def has_gradients(self) -> bool:
        """Whether there are gradients among the results."""
        return any(name.startswith("d") for name in (*self.sums, *self.steps))

    def numbers(self) -> Results:
        """Every number of the call in float64, as `draw` of cases.py has them."""
        case = self.case
        values = {"bias_ih": self.bias[0], "bias_hh": self.bias[1]}
        numbers = {
            f"w.{name}": torch.full_like(p.detach(), values.get(name.split("_l")[0], self.weight))
            for name, p in case.module(nn, torch.float64).named_parameters()
        }
        stack = case.layers * case.directions
        numbers["x"] = torch.ones(case.T, case.B, case.I, dtype=torch.float64)
        for name in case.states:
            shape = (stack, case.B, case.H)
            numbers[name] = torch.full(shape, self.state, dtype=torch.float64)
        for name, shape in case.output_shapes().items():
            numbers[f"g.{name}"] = torch.ones(shape, dtype=torch.float64)
        return numbers

    def compared(self, found: Results) -> dict[str, tuple[Tensor, Tensor, float]]:
        """By name what was found, what was printed, and how far that can be off by its digits."""
        compared = {}
        for name, printed in self.sums.items():
            parts = [value for key, value in found.items() if key in name.split(" + ")]
            if name == "dw":
                parts = [value for key, value in found.items() if key.split("_")[0] in GRADIENTS]
            want = torch.tensor(float(printed), dtype=torch.float64)
            total = torch.stack([part.sum() for part in parts]).sum()
            compared[name] = total, want, half_a_digit(printed)
        for name, rows in self.steps.items():
            pairs = [(row,) if isinstance(row, str) else row for row in rows]
            want = torch.tensor([[float(text) for text in pair] for pair in pairs]).double()
            got = found[name]  # [T, B, D*H]
            want = want.repeat_interleave(got.shape[-1] // want.shape[-1], -1)[:, None]
            lengths = torch.tensor(self.case.lengths or [self.case.T] * self.case.B)
            there = torch.arange(self.case.T)[:, None] < lengths  # [T, B]
            off = max(half_a_digit(text) for pair in pairs for text in pair)
            compared[name] = got, want * there[..., None], off
        return compared


GRADIENTS = ("d weight", "d bias")


def half_a_digit(printed: str) -> float:
    """How far a number can be from what was printed of it: 0 from an integer."""
    exponent = Decimal(printed).as_tuple().exponent
    assert isinstance(exponent, int)
    return 0.0 if "." not in printed else 0.5 * 10.0**exponent


# NVIDIA's sample of cuDNN's RNNs, golden_1.txt to golden_3.txt: 2 layers, each weight 1/H^2, each
# bias 1. "dw" adds up the gradients of all parameters, of both biases.
NVIDIA = 1e-3  # the tolerance of the sample
H = 512
SAMPLE = {"T": 20, "B": 64, "I": H, "H": H, "layers": 2}
SAMPLES = [
    Published(
        "NVIDIA",
        Case(**SAMPLE),
        1 / H**2,
        (1.0, 1.0),
        NVIDIA,
        {
            "y": "5.749536E+05",
            "c_n": "4.365091E+05",
            "h_n": "5.774818E+04",
            "d x": "3.842206E+02",
            "d c0": "9.323785E+03",
            "d h0": "1.182562E+01",
            "dw": "4.313461E+08",
        },
    ),
    Published(
        "NVIDIA",
        Case(**SAMPLE, kind="RNN_RELU"),
        1 / H**2,
        (1.0, 1.0),
        NVIDIA,
        {
            "y": "1.315793E+06",
            "h_n": "1.315212E+05",
            "d x": "6.676003E+01",
            "d h0": "6.425050E+01",
            "dw": "1.453750E+09",
        },
    ),
    Published(
        "NVIDIA",
        Case(**SAMPLE, kind="RNN_TANH"),
        1 / H**2,
        (1.0, 1.0),
        NVIDIA,
        {
            "y": "6.319591E+05",
            "h_n": "6.319605E+04",
            "d x": "4.501830E+00",
            "d h0": "4.489543E+00",
            "dw": "5.012598E+07",
        },
    ),
]

# The tests of cudnn.torch, the binding of the older Torch: the same calls in both directions, but
# that every parameter, weight or bias, is 1 / the number of parameters.
LSTM_PARAMETERS = 4 * (2 * (2 * H * H + 2 * H) + 2 * (3 * H * H + 2 * H))
RNN_PARAMETERS = LSTM_PARAMETERS // 4
RNN_SUMS = {
    "y": "1.388634E+01",
    "h_n": "1.288997E+01",
    "d x": "1.288729E+01",
    "d h0": "1.279004E+01",
    "dw": "7.061081E+07",
}
SAMPLES += [
    Published(
        "cudnn.torch",
        Case(**SAMPLE, directions=2),
        1 / LSTM_PARAMETERS,
        (1 / LSTM_PARAMETERS,) * 2,
        NVIDIA,
        {
            "y": "3.134097E+04",
            "c_n": "3.845626E+00",
            "h_n": "1.922855E+00",
            "d x": "4.794993E+00",
            "d c0": "2.870925E+04",
            "d h0": "2.468645E+00",
            "dw": "1.121568E+08",
        },
    ),
    *(
        Published(
            "cudnn.torch",
            Case(**SAMPLE, directions=2, kind=kind),
            1 / RNN_PARAMETERS,
            (1 / RNN_PARAMETERS,) * 2,
            NVIDIA,
            RNN_SUMS,  # so small that tanh changes none of these digits
        )
        for kind in ("RNN_RELU", "RNN_TANH")
    ),
]

# TensorFlow, the kernel test of CudnnRNN: 16 parameters.
TENSORFLOW = 1e-3
SMALL = [
    Published(
        "TensorFlow",
        Case(T=6, B=3, I=1, H=1, lengths=(6, 3, 2)),
        0.2,
        (0.2, 0.2),
        TENSORFLOW,
        steps={"y": (".2153", ".3515", ".4331", ".4821", ".5122", ".5313")},
        state=0.0,
    ),
    Published(
        "TensorFlow",
        Case(T=3, B=2, I=1, H=1),
        1.0,
        (1.0, 1.0),
        TENSORFLOW,
        steps={"y": (".94405508", ".97515064", ".98065156")},
    ),
    # TensorFlow, the Python tests of CudnnRNN ("testSimpleInference"): everything is 1.
    Published(
        "TensorFlow",
        Case(T=10, B=20, I=200, H=200, layers=4),
        1.0,
        (1.0, 1.0),
        TENSORFLOW,
        {"y + h_n + c_n": "231833.22"},
    ),
    Published(
        "TensorFlow",
        Case(T=10, B=20, I=200, H=200, layers=4, kind="RNN_TANH"),
        1.0,
        (1.0, 1.0),
        TENSORFLOW,
        {"y + h_n": "56000"},
    ),
    Published(
        "TensorFlow",
        Case(T=2, B=4, I=4, H=8, layers=2, kind="RNN_RELU"),
        1.0,
        (1.0, 1.0),
        TENSORFLOW,
        {"y + h_n": "130688"},
    ),
    # SYCLomatic, its test of cuDNN's RNNs: 3 layers, everything is 1, one bias (of the input).
    Published(
        "SYCLomatic",
        Case(T=4, B=3, I=2, H=2, layers=3, kind="RNN_RELU"),
        1.0,
        (1.0, 0.0),
        0.0,
        steps={"y": ("29", "165", "661", "2229"), "d x": ("1672", "496", "124", "22")},
    ),
    Published(
        "SYCLomatic",
        Case(T=4, B=3, I=2, H=2, layers=3, directions=2, kind="RNN_RELU"),
        1.0,
        (1.0, 0.0),
        0.0,
        steps={"y": (("3719", "47275"), ("9739", "21779"), ("21779", "9739"), ("47275", "3719"))},
    ),
]
