from __future__ import annotations

import threading
import warnings

import pytest

from fastsal.errors import PrecisionWarning
from fastsal.utils.warn import warn_user, without_warnings


def test_warnings_are_dropped_in_one_thread_and_the_filters_of_the_process_stay():
    filters = list(warnings.filters)
    seen = []

    def other():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            warn_user("here", PrecisionWarning)
        seen.extend(str(w.message) for w in caught)

    with without_warnings(PrecisionWarning):
        assert warnings.filters == filters
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warn_user("dropped", PrecisionWarning)
            with pytest.raises(UserWarning, match="another category"):
                warn_user("another category")
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert seen == ["here"]
    with pytest.warns(PrecisionWarning, match="again"):
        warn_user("again", PrecisionWarning)
