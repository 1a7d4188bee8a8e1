"""This box: processes, images, networks, resources. Only this room starts processes."""
