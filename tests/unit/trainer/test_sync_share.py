"""The share of a step in which weights were brought to the engine, by hand."""

from prefixrl_mcore.trainer.step_metrics import sync_share


def test_checksums_sleep_and_waking_are_in_the_share() -> None:
    figures = {
        "sync/seconds": 2.0,
        "sync/check_seconds": 3.0,
        "time/sync_seconds": 6.0,
        "time/step_seconds": 24.0,  # a second to sleep and wake
    }

    assert sync_share(figures) == {"sync/step_fraction": 0.25}


def test_no_share_where_no_weights_were_sent() -> None:
    assert sync_share({"time/sync_seconds": 6.0, "time/step_seconds": 24.0}) == {}
