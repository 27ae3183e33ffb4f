"""How often a request may be lost, and to what."""

from prefixrl_mcore.rollout.sglang.retries import Retries


def test_deaths_of_servers_and_other_losses_have_bounds_of_their_own() -> None:
    retries = Retries(2, router_seconds=0.0)
    for server in range(2):
        retries.note_loss(7, server, "death")
        retries.note_loss(7, server, "other")
        assert retries.may_retry(7)

    assert (retries.num_lost(7), retries.num_deaths(7)) == (4, 2)
    retries.note_loss(7, 0, "death")
    assert not retries.may_retry(7)
    assert retries.may_retry(8)


def test_request_that_its_own_faults_used_up_is_lost() -> None:
    retries = Retries(1, router_seconds=0.0)
    retries.note_loss(0, 0, "other")
    assert retries.may_retry(0)
    retries.note_loss(0, 1, "other")
    assert not retries.may_retry(0)
    assert retries.lost_on(0) == 1


def test_losses_by_an_absent_router_count_when_its_time_is_over() -> None:
    patient, hasty = Retries(1, router_seconds=60.0), Retries(1, router_seconds=0.0)
    for retries in (patient, hasty):
        for _ in range(2):
            retries.note_loss(0, -1, "router")
        retries.note_loss(0, -1, "other")

    assert patient.may_retry(0)
    assert not hasty.may_retry(0)
    patient.note_loss(0, -1, "other")
    assert not patient.may_retry(0)
