"""How the modules declare their options: frozen dataclasses whose fields carry default, help and resume rule."""

from dataclasses import field
from typing import Any


def option(default: Any, help: str, *, may_change: bool = False, plugins: str | None = None) -> Any:
    """A dataclass field of a config.

    `may_change` allows another value when a run is resumed. `plugins` names the package (below `pipeline`) whose
    files this option chooses from by `name`; the default is then the name of one, or a tuple of names.
    """
    return field(default=default, metadata={"help": help, "may_change": may_change, "plugins": plugins})
