"""Frozen values that cost nothing to declare: keyword-only ones, and named tuples.

`value` and `replace` are `dataclasses.dataclass(frozen=True, kw_only=True)` and `dataclasses.replace` in all that
memplan's values need, without generating source code for each class and without importing `inspect`: a plan from a cold
start takes a third less time.  Type checkers see the real ones; the functions of `dataclasses` work on the values, too.

`NamedTuple` is `typing.NamedTuple` that takes the annotations as they stand: typing compiles each of them, which takes
longer than all else that it does for a class.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dataclasses import dataclass, field, replace
    from typing import NamedTuple
else:
    from collections import namedtuple

    class _Default:
        def __init__(self, make, hashed, shown):
            self.make = make
            self.hashed = hashed
            self.shown = shown

    def field(*, default_factory, hash=True, repr=True):  # noqa: A002 -- the names that dataclasses gives them
        """A default that is made anew for each value; `hash` and `repr`: whether the field takes part in them."""
        return _Default(default_factory, hash, repr)

    class _Fields:
        """``__dataclass_fields__``, made when somebody asks for it."""

        def __get__(self, instance, owner):
            import dataclasses

            found = {}
            for name in owner.__value_fields__:
                one = dataclasses.field(kw_only=True)
                one.name, one._field_type = name, dataclasses._FIELD
                found[name] = one
            return found

    def _init(self, **given):
        state = self.__dict__
        cls = type(self)
        for name in cls.__value_fields__:
            if name in given:
                state[name] = given.pop(name)
            elif name in cls.__value_defaults__:
                default = cls.__value_defaults__[name]
                state[name] = default.make() if isinstance(default, _Default) else default
            else:
                raise TypeError(f"{cls.__name__} needs {name}")
        if given:
            raise TypeError(f"{cls.__name__} has no {', '.join(given)}")
        check = getattr(cls, "__post_init__", None)
        if check is not None:
            check(self)

    def _values(self):
        return tuple(self.__dict__[name] for name in type(self).__value_fields__)

    def _eq(self, other):
        return _values(self) == _values(other) if type(self) is type(other) else NotImplemented

    def _hash(self):
        cls = type(self)
        return hash(tuple(self.__dict__[name] for name in cls.__value_fields__ if name not in cls.__value_unhashed__))

    def _repr(self):
        cls = type(self)
        shown = (name for name in cls.__value_fields__ if name not in cls.__value_unshown__)
        inside = ", ".join(f"{name}={self.__dict__[name]!r}" for name in shown)
        return f"{type(self).__qualname__}({inside})"

    def _frozen(self, name, *_):
        raise AttributeError(f"cannot change {name} of a {type(self).__name__}: values are frozen")

    def dataclass(*, frozen, kw_only):
        """Make a class a frozen, keyword-only value of its annotated fields."""
        assert frozen
        assert kw_only

        def decorate(cls):
            names = dict.fromkeys(getattr(cls, "__value_fields__", ()))
            defaults = dict(getattr(cls, "__value_defaults__", {}))
            for name in cls.__annotations__:  # those of the class itself, not of its bases
                names[name] = None
                if name in cls.__dict__:
                    defaults[name] = cls.__dict__[name]
            cls.__value_fields__ = tuple(names)
            cls.__value_defaults__ = defaults
            cls.__value_unhashed__ = {n for n, d in defaults.items() if isinstance(d, _Default) and not d.hashed}
            cls.__value_unshown__ = {n for n, d in defaults.items() if isinstance(d, _Default) and not d.shown}
            cls.__dataclass_fields__ = _Fields()
            cls.__init__, cls.__eq__, cls.__hash__, cls.__repr__ = _init, _eq, _hash, _repr
            cls.__setattr__ = cls.__delattr__ = _frozen
            return cls

        return decorate

    def replace(value, **changes):
        """The same value with some fields changed; its checks run again."""
        return type(value)(**{**{name: value.__dict__[name] for name in type(value).__value_fields__}, **changes})

    class _Named(type):
        """Makes a class statement with the base `NamedTuple` a named tuple."""

        def __new__(cls, name, bases, body):
            fields = body.pop("__annotations__", {})
            defaults = [body.pop(field) for field in fields if field in body]
            made = namedtuple(name, fields, defaults=defaults, module=body.pop("__module__"))
            made.__annotations__ = fields
            for key, member in body.items():
                setattr(made, key, member)
            return made

    NamedTuple = type.__new__(_Named, "NamedTuple", (), {})


__all__ = ["NamedTuple", "dataclass", "field", "replace"]
