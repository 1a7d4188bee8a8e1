"""The HTTP shim: the API of the original teaching project, in front of the daemon's socket."""
