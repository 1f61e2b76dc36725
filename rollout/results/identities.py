"""What a run is told by in its manifest: two runs of equal identities give the same rows.

Fields that came later are not required, so that a run begun before them is the same run.
"""

from typing import Annotated, Any, Literal, NotRequired, TypedDict

from pydantic import ConfigDict, Discriminator, Field, Tag, with_config

STRICT = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)
Count = Annotated[int, Field(ge=0, lt=2**53)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Seconds = Annotated[float, Field(ge=0, lt=2**53)]
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Plain = None | bool | int | Number | str


@with_config(STRICT)
class Code(TypedDict):
    """A function of the caller's: its name, and a digest of its code and of what that calls."""

    name: str
    code: str | None


ModelIdentity = TypedDict(
    "ModelIdentity", {"class": str, "parameters": Count, "fingerprint": str, "code": NotRequired[str | None]}
)
with_config(STRICT)(ModelIdentity)


@with_config(STRICT)
class DatasetIdentity(TypedDict):
    """The samples: how many, of what, and the digests of a few of them."""

    name: str
    task: str
    samples: Count
    features: list[str]
    fingerprint: str
    padding_ids: NotRequired[dict[str, int | None]]
    content: NotRequired[dict[str, str | None]]


@with_config(STRICT)
class MethodIdentity(TypedDict):
    """The formula: see `rollout.Method`."""

    name: str | None
    head_fusion: str | list[Number] | list[list[Number]]
    residual: Number
    attention: Number | None
    renormalize: bool
    discard_ratio: Number
    start_layer: Count
    gradients: str | None
    values: NotRequired[Literal["norm_then_sum", "sum_then_norm"] | None]
    own_path: NotRequired[bool]
    normalize_attention: NotRequired[bool]
    paper: NotRequired[str]


@with_config(STRICT)
class FormulaIdentity(TypedDict):
    """A method that is no chain: its formula in words."""

    name: str
    formula: list[str]
    paper: str


CHAIN, FORMULA = "(chain)", "(formula)"
AnyMethod = Annotated[
    Annotated[MethodIdentity, Tag(CHAIN)] | Annotated[FormulaIdentity, Tag(FORMULA)],
    Discriminator(lambda value: FORMULA if isinstance(value, dict) and "formula" in value else CHAIN),
]


@with_config(STRICT)
class Identity(TypedDict):
    """What is run on what: two runs of equal identities give the same rows."""

    model: ModelIdentity
    dataset: DatasetIdentity
    method: AnyMethod
    plan: dict[str, Count | bool]
    readout: str
    backend: str
    target_class: Count | None
    explain: NotRequired[Code | None]
    collate: NotRequired[Code | None]
    python: NotRequired[str | None]


@with_config(STRICT)
class Evaluation(TypedDict):
    """How attributions are scored: see `rollout.evaluate_cohort`."""

    metric: Literal["eraser", "pyhealth"]
    shares: list[Number]
    replacement: Literal["delete", "pad", "resample"]
    threshold: Number
    seed: Count
    leave_one_out: Count
    planted: str | None


@with_config(STRICT)
class EvaluationIdentity(TypedDict):
    """What is evaluated on what: two evaluations of equal identities give the same rows."""

    model: ModelIdentity
    dataset: DatasetIdentity
    evaluation: Evaluation
    methods: dict[str, dict[str, Any]]
    plan: dict[str, Count | bool]
    collate: NotRequired[Code | None]
    python: NotRequired[str | None]
