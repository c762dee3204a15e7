"""A method on an instance in place of its class's, for as long as a run is in force: the one way in which zipvl comes
before a method that it can reach by no argument and no hook."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar


class Method:
    """What stands on an instance in place of one of its methods. It is a part of the instance: deep copies and pickles
    of a module have copies of their own.

    Args:
        owner: the instance, such as a module.

    Attributes:
        name: of the method.
        chains: whether it may come before one that the instance has already, such as accelerate's.
        before: the method that the instance had of its own; None: its class's.
    """

    name: ClassVar[str] = "forward"
    chains: ClassVar[bool] = False

    def __init__(self, owner: Any) -> None:
        self.owner = owner
        self.before = vars(owner).get(self.name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def ordinary(self, *args: Any, **kwargs: Any) -> Any:
        """What the instance does without it."""
        if self.before is not None:
            return self.before(*args, **kwargs)
        return getattr(type(self.owner), self.name)(self.owner, *args, **kwargs)

    def install(self) -> None:
        """Takes the method's place, unless the instance has one already that it must not come before."""
        if self.before is None or self.chains:
            vars(self.owner)[self.name] = self

    @classmethod
    def is_on(cls, owner: Any) -> bool:
        """Whether the method of ``owner`` is one of this class."""
        return isinstance(vars(owner).get(cls.name), cls)

    @classmethod
    def remove(cls, owner: Any) -> None:
        """Gives ``owner`` back what it had; nothing where another's method came before this one since."""
        if not cls.is_on(owner):
            return
        own = vars(owner).pop(cls.name)
        if own.before is not None:
            vars(owner)[cls.name] = own.before


@contextmanager
def set_aside(owners: Iterable[Any]) -> Iterator[None]:
    """Has the instances run what they do without their ``Method`` for the length of a block, in every thread."""
    methods = [method for owner in owners for method in vars(owner).values() if isinstance(method, Method)]
    for method in methods:
        type(method).remove(method.owner)
    try:
        yield
    finally:
        for method in methods:
            method.install()
