"""What a cloud does: vms, disks, networks, templates and jobs. One module a noun."""
