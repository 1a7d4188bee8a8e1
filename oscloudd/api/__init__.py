"""The front door: the socket, the framing, who is calling, and the table of methods."""
