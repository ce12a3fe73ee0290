"""Everything that can be set for a fine-tune, in one place, with its default."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from pipeline.errors import InputError

Method = Literal["lora", "qlora", "full"]
Trainer = Literal["auto", "unsloth", "hf"]


@dataclass(frozen=True)
class FinetuneParameters:
    """Parameters of one fine-tune; the same ones drive unsloth and transformers + PEFT."""

    base: str = "embedded"
    revision: str | None = None
    data: str = "soc"
    eval_data: str | None = None
    eval_share: float = 0.1
    max_rows: int | None = None
    method: Method = "lora"
    trainer: Trainer = "auto"
    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0
    learning_rate: float | None = None
    epochs: float = 1.0
    max_steps: int | None = None
    batch_size: int = 4
    gradient_accumulation: int = 1
    warmup_steps: int = 5
    weight_decay: float = 0.0
    max_length: int = 1024
    save_steps: int = 50
    seed: int = 7

    def __post_init__(self) -> None:
        for name, known in (("method", get_args(Method)), ("trainer", get_args(Trainer))):
            if getattr(self, name) not in known:
                raise InputError(f"{name}={getattr(self, name)!r} is not known", remedy=f"use one of {', '.join(known)}")
        for name in (
            "rank",
            "alpha",
            "epochs",
            "batch_size",
            "gradient_accumulation",
            "max_length",
            "save_steps",
            "peak_learning_rate",
        ):
            if not getattr(self, name) > 0:
                raise InputError(f"{name}={getattr(self, name)} must be greater than 0")
        if not 0 < self.eval_share < 1:
            raise InputError(f"eval_share={self.eval_share} must lie between 0 and 1")

    @property
    def peak_learning_rate(self) -> float:
        """What was asked for, else what suits: the small embedded base bears ten times the usual rate of LoRA."""
        if self.learning_rate is not None:
            return self.learning_rate
        if self.method == "full":
            return 2e-5
        return 2e-3 if self.base == "embedded" else 2e-4

    @classmethod
    def from_notebook(cls, names: Mapping[str, Any]) -> FinetuneParameters:
        """Take each field from the notebook variable of the same name in capitals."""
        return cls(**{field.name: names[field.name.upper()] for field in fields(cls) if field.name.upper() in names})

    def to_json(self) -> dict[str, Any]:
        """All parameters as a dict, the learning rate as it is in force."""
        return {**asdict(self), "learning_rate": self.peak_learning_rate}
