"""What the tests of several folders need: the cases, the check, the tolerance, and stand-ins."""
