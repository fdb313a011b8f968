"""A head's card: which model it belongs to, and how it came to be. JSON, checked field by field."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

FORMAT = 1
MAX_CARD_BYTES = 64 * 2**10
MAX_DIM, MAX_FEATURE_LAYERS, MAX_LAYERS = 512, 8, 1024


@dataclass(frozen=True, slots=True)
class HeadCard:
    """`fingerprint` is the model file's. Recipe, data and quality are for people: nothing is computed from them."""

    model: str
    fingerprint: str
    hidden_size: int
    n_layers: int
    feature_layers: tuple[int, ...]
    dim: int
    seed: int
    recipe: Mapping[str, Any]
    data: Mapping[str, Any]
    quality: Mapping[str, Any]

    @property
    def n_features(self) -> int:
        """The embedding and each feature layer's residual stream."""
        return (1 + len(self.feature_layers)) * self.hidden_size

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n"

    @classmethod
    def of_json(cls, raw: bytes) -> HeadCard:
        """Raises ValueError that says what is wrong."""
        if len(raw) > MAX_CARD_BYTES:
            raise ValueError(f"it has more than {MAX_CARD_BYTES} bytes")
        try:
            fields = json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise ValueError("it is no JSON") from error
        if not isinstance(fields, dict) or fields.pop("format", None) != FORMAT:
            raise ValueError(f"its format is not {FORMAT}")
        kinds = {"model": str, "fingerprint": str, "hidden_size": int, "n_layers": int, "feature_layers": list,
                 "dim": int, "seed": int, "recipe": dict, "data": dict, "quality": dict}
        if set(fields) != set(kinds):
            raise ValueError(f"its fields are {', '.join(sorted(map(str, fields)))[:200]}")
        for name, kind in kinds.items():
            if type(fields[name]) is not kind:
                raise ValueError(f"{name} is no {kind.__name__}")
        card = cls(**{**fields, "feature_layers": tuple(fields["feature_layers"])})
        card._check()
        return card

    def _check(self) -> None:
        layers = self.feature_layers
        if not (0 < self.dim <= MAX_DIM and 0 < self.hidden_size <= 1 << 20 and 0 < self.n_layers <= MAX_LAYERS):
            raise ValueError(f"its sizes are impossible: dim {self.dim}, hidden_size {self.hidden_size}")
        if not (0 < len(layers) <= MAX_FEATURE_LAYERS and all(type(layer) is int for layer in layers)
                and list(layers) == sorted(set(layers)) and layers[0] >= 0 and layers[-1] < self.n_layers - 1):
            raise ValueError(f"its feature layers are {list(layers)[:MAX_FEATURE_LAYERS + 1]}")
