"""oscloudd: the daemon that supervises qemu virtual machines."""

__version__ = "0.1.0"
