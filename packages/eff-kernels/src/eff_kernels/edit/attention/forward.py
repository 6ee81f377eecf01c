"""A forward of one module that does something around the module's own."""

from __future__ import annotations

from typing import Any

from torch import nn


class Forward:
    """Base of such forwards: objects, so that copies and pickles of a module keep to themselves."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.own = module, module.__dict__.get("forward")
        self.by_class = type(module).forward

    def plain(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward."""
        return self.by_class(self.module, *args, **kwargs) if self.own is None else self.own(*args, **kwargs)

    @classmethod
    def restore(cls, module: nn.Module) -> None:
        """Give a module its own forward back; if it was wrapped again since, this one stays and passes calls on."""
        here = module.__dict__.get("forward")
        if isinstance(here, cls):
            if here.own is None:
                del module.forward
            else:
                module.forward = here.own

    def __getstate__(self) -> dict[str, Any]:
        return {"module": self.module, "own": self.own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, by_class=type(state["module"]).forward)
