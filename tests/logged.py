"""What libraries log as warnings, which they do not show as Python warnings; needs nothing else."""

import logging


class Collector(logging.Handler):
    """Keeps the messages of the loggers that it listens to."""

    def __init__(self, *names):
        super().__init__(logging.WARNING)
        self.messages = []
        for name in names:
            logging.getLogger(name).addHandler(self)

    def emit(self, record):
        self.messages.append(f"{record.name}: {record.getMessage()}")
