"""One qemu: its argument vector, its process, its monitor, its serial console, its accelerator.

Knows nothing of vms as users have them, of databases or of templates; it is told what to run and
which open files to hand over.
"""
