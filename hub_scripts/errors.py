"""What goes wrong on the user's side."""


class UserError(Exception):
    """Something the user can mend. The message says what is wrong and what to do; the command line prints only it."""
