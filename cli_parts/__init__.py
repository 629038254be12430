"""What stands on stego.py and below cli.py: scores, outputs, pictures. Private: import `stego`, not this."""
