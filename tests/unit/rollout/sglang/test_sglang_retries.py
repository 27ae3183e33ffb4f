"""How often a request may be lost, and to what."""

from prefixrl_mcore.rollout.sglang.retries import Retries


def test_deaths_of_servers_and_other_losses_have_bounds_of_their_own() -> None:
    retries = Retries(2)
    for server in range(2):
        retries.note_loss(7, server, is_death=True)
        retries.note_loss(7, server, is_death=False)
        assert retries.may_retry(7)

    assert (retries.num_lost(7), retries.num_deaths(7)) == (4, 2)
    retries.note_loss(7, 0, is_death=True)
    assert not retries.may_retry(7)
    assert retries.may_retry(8)


def test_request_that_its_own_faults_used_up_is_lost() -> None:
    retries = Retries(1)
    retries.note_loss(0, 0, is_death=False)
    assert retries.may_retry(0)
    retries.note_loss(0, 1, is_death=False)
    assert not retries.may_retry(0)
    assert retries.lost_on(0) == 1
