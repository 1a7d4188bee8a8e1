"""`python -m oscloudctl.http` is `oscloud-http`."""

from oscloudctl.http.main import main

main()
