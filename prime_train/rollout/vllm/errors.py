"""What can be wrong with servers; imports nothing, so that the command line can name it without waiting for torch."""


class ServerError(RuntimeError):
    """A server cannot be used, and says which, by its URL, or weights cannot be put where it reads them; and why."""


class Unavailable(ServerError):
    """An attempt came to nothing; another may not."""


class ServerDied(ServerError):
    """The process of the run's own server has ended."""
