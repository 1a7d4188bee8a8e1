"""Everything that talks to the daemon: the command line and, in `http/`, the HTTP shim."""
