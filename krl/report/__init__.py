"""What runs showed: figures and a page from their work directories; `python -m krl.report`."""
