"""The helpers of several folders of tests: the cases, the check, the tolerance, and stand-ins."""
