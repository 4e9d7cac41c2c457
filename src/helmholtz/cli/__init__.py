"""The command line: ``helmholtz data | train | evaluate | generate | compare | inspect``."""
