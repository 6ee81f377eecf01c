"""What tests mark themselves with that run methods on models of other libraries."""

import pytest

MARKS = [
    pytest.mark.usefixtures("one_thread"),
    # transformers and PEFT rename and deprecate from release to release; what they compute is looked at here.
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning"),
]
