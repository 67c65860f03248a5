"""The patterns, one family of producers' graphs a file, in the order in which they are tried."""

from qfuse.patterns import int8

from qfuse.family import Family

FAMILIES: tuple[Family, ...] = (int8.FAMILY,)
