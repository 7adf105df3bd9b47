import urllib.request

import pytest

from teacher_service.metrics import Metrics


def texts(metrics: Metrics) -> dict[str, dict[tuple[str, ...], float]]:
    """Sample name -> label names and values -> value."""
    found: dict[str, dict[tuple[str, ...], float]] = {}
    for family in metrics.registry.collect():
        for sample in family.samples:
            labels = tuple(f"{name}={value}" for name, value in sample.labels.items())
            found.setdefault(sample.name, {})[labels] = sample.value
    return found


def used() -> Metrics:
    metrics = Metrics(max_accounts=2, queue_pictures=lambda: 7)
    metrics.batch_done(protocol="mekd", account="a", outcome="charged", pictures=5, seconds=0.02)
    metrics.batch_done(protocol="mekd", account="a", outcome="charged", pictures=4, seconds=0.3)
    metrics.batch_done(protocol="mekd", account="b", outcome="overloaded", pictures=3, seconds=0.001)
    metrics.engine_batch(9)
    metrics.balance("a", 91)
    return metrics


def test_names_and_labels_are_those_of_the_contract() -> None:
    families = {
        family.name: {name for sample in family.samples for name in sample.labels} - {"le"}
        for family in used().registry.collect()
    }
    assert families == {
        "mekd_pictures": {"account", "outcome"},  # _total in the exposition, see below
        "mekd_requests": {"protocol", "outcome"},
        "mekd_request_duration_seconds": {"protocol"},
        "mekd_engine_batch_pictures": set(),
        "mekd_queue_pictures": set(),
        "mekd_account_balance_pictures": {"account"},
    }


def test_what_happened_is_counted_once() -> None:
    found = texts(used())
    assert found["mekd_pictures_total"] == {
        ("account=a", "outcome=charged"): 9.0,
        ("account=b", "outcome=overloaded"): 3.0,
    }
    assert found["mekd_requests_total"] == {
        ("protocol=mekd", "outcome=charged"): 2.0,
        ("protocol=mekd", "outcome=overloaded"): 1.0,
    }
    assert found["mekd_request_duration_seconds_sum"] == {("protocol=mekd",): pytest.approx(0.321)}
    assert found["mekd_engine_batch_pictures_sum"] == {(): 9.0}
    assert found["mekd_queue_pictures"] == {(): 7.0}
    assert found["mekd_account_balance_pictures"] == {("account=a",): 91.0}


def test_accounts_beyond_the_limit_are_counted_together() -> None:
    metrics = used()
    for index in range(50):
        metrics.batch_done(protocol="mekd", account=f"new-{index}", outcome="charged", pictures=2, seconds=0.1)
        metrics.balance(f"new-{index}", index)
    found = texts(metrics)
    assert found["mekd_pictures_total"]["account=other", "outcome=charged"] == 100.0
    assert len(found["mekd_pictures_total"]) == 3
    assert found["mekd_account_balance_pictures"] == {("account=a",): 91.0}
    metrics.batch_done(protocol="mekd", account="b", outcome="charged", pictures=1, seconds=0.1)
    assert texts(metrics)["mekd_pictures_total"]["account=b", "outcome=charged"] == 1.0


def test_two_servers_in_one_process_count_apart() -> None:
    used()
    assert "mekd_pictures_total" not in texts(Metrics(max_accounts=1, queue_pictures=lambda: 0))


def test_metrics_are_served_over_http() -> None:
    metrics = used()
    port = metrics.serve("127.0.0.1", 0)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    assert 'mekd_pictures_total{account="a",outcome="charged"} 9.0' in text
    assert "# HELP mekd_queue_pictures" in text
    with pytest.raises(OSError, match="in use"):
        used().serve("127.0.0.1", port)
