"""`python -m oscloudctl` is the command line."""

from oscloudctl.main import main

main()
