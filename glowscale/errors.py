"""The base of every error that a user can mend."""


class UserError(ValueError):
    """Something that the user can put right; the message is one sentence that says what.

    It names what was wrong and where (file, key, layer, value) and what is allowed. Jobs print
    the message without a traceback.
    """
