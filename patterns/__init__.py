"""The patterns, one family of producers' graphs a file, in the order in which they are tried."""

from qfuse.family import Family
from qfuse.patterns import int8

FAMILIES: tuple[Family, ...] = (int8.FAMILY,)
