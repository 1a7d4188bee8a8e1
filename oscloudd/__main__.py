"""`python -m oscloudd` is the daemon."""

from oscloudd.main import main

main()
