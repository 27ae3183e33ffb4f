"""Which weights a model has, and whether a stream of weights covers them exactly.

An engine that is sent a wrong or a missing name may keep the old weight without a word, so the
check is made on this side.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from prefixrl_mcore.checkpoint.convert.hf_folder import HfWeights
from prefixrl_mcore.config.json_files import read_json_object
from prefixrl_mcore.rollout.engine import EngineError

_TIED_HEAD = "lm_head.weight"
"""The name that a head with the embedding's weights has; a stream may send it or leave it out."""

_NAMES_SHOWN = 5
_REMEDY = "name the folder of a Hugging Face model"


@dataclass(kw_only=True, slots=True)
class WeightCoverage:
    """Ticks off the weights of one stream against those of the model."""

    shapes: Mapping[str, tuple[int, ...]]
    """Hugging Face name -> shape of every weight that the model has."""

    tied_names: frozenset[str] = frozenset()
    """Further names that may come and are not loaded: their weight has another name too."""

    _seen: set[str] = field(default_factory=set)

    def is_to_load(self, name: str, shape: tuple[int, ...]) -> bool:
        """Tick ``name`` off; return False if its weight is loaded under another name.

        Raises:
            EngineError: if the name is unknown or came before, or the shape differs.
        """
        if name in self.tied_names:
            return False
        expected = self.shapes.get(name)
        if expected is None:
            raise EngineError(
                f"weights: the model has no {name!r}; expected its {len(self.shapes)} Hugging Face "
                f"names, such as {_some(sorted(self.shapes))}"
            )
        if name in self._seen:
            raise EngineError(f"weights: {name!r} came twice in one stream")
        if shape != expected:
            raise EngineError(
                f"weights: {name!r} has shape {list(shape)}, expected {list(expected)}"
            )
        self._seen.add(name)
        return True

    def check_complete(self) -> None:
        """Raise unless every weight of the model was ticked off.

        Raises:
            EngineError: if one is missing.
        """
        missing = sorted(set(self.shapes) - self._seen)
        if missing:
            raise EngineError(
                f"weights: {len(missing)} of the model's {len(self.shapes)} did not come: "
                f"{_some(missing)}"
            )


def read_weight_coverage(model_folder: Path) -> WeightCoverage:
    """Return a fresh coverage of the weights in a Hugging Face folder, as the policy reads it.

    Raises:
        ValueError: if the folder has no config, or no weights that can be read.
    """
    with HfWeights(model_folder) as weights:
        shapes = {name: info.shape for name, info in weights.infos.items()}
    tied_names: frozenset[str] = frozenset()
    if read_model_config(model_folder).get("tie_word_embeddings", False):
        shapes.pop(_TIED_HEAD, None)
        tied_names = frozenset({_TIED_HEAD})
    return WeightCoverage(shapes=shapes, tied_names=tied_names)


def read_model_config(model_folder: Path) -> dict[str, object]:
    """Return ``config.json`` of a Hugging Face folder.

    Raises:
        ValueError: if it is missing or not a JSON object.
    """
    return read_json_object(model_folder / "config.json", remedy=_REMEDY)


def read_config_number(model_folder: Path, name: str, default: int | None = None) -> int:
    """Return the whole number ``name`` of a Hugging Face folder's ``config.json``.

    Raises:
        ValueError: if it is missing and there is no default, or not a whole number.
    """
    value = read_model_config(model_folder).get(name)
    if value is None and default is not None:
        return default
    if not isinstance(value, int):
        raise ValueError(
            f"{model_folder / 'config.json'}: expected a whole number as {name!r}, got {value!r}"
        )
    return value


def read_end_token_ids(model_folder: Path) -> frozenset[int]:
    """Return the end tokens that the model's config and generation config name.

    Raises:
        ValueError: if a file is not a JSON object.
    """
    found: set[int] = set()
    for path in (model_folder / "config.json", model_folder / "generation_config.json"):
        if not path.is_file():
            continue
        value = read_json_object(path, remedy=_REMEDY).get("eos_token_id")
        if isinstance(value, int):
            found.add(value)
        elif isinstance(value, list):
            found.update(value)
    return frozenset(found)


def _some(names: list[str]) -> str:
    """Render the first names, and how many more there are."""
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return ", ".join(names[:_NAMES_SHOWN]) + more
