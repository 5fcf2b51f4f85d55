"""mcrelay: a multicast UDP relay for networks where ordinary multicast routing cannot go."""

__version__ = "0.1.0"
