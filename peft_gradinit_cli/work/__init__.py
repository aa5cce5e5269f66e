"""What the commands do.

Everything in here needs torch and the libraries of models, which load slowly. Importing it silences
them: standard error is left to what the commands say.
"""

import transformers

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
