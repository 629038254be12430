# ---- diagnostics -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_average_precision_against_the_definition(seed):
    rng = np.random.default_rng(seed)
    values, positive = rng.integers(0, 12, 80) / 4, rng.random(80) < 0.4  # with many ties
    average, recall_before = 0.0, 0.0
    for threshold in sorted(set(values), reverse=True):
        kept = values >= threshold
        recall = positive[kept].sum() / positive.sum()
        average += (recall - recall_before) * positive[kept].mean()
        recall_before = recall
    found = precision_recall(values, positive)
    assert found["average_precision"] == pytest.approx(average, abs=1e-12)
    assert found["recall"][-1] == 1 and found["precision"][-1] == positive.mean()
    assert sorted(found["recall"]) == found["recall"]


def test_diagnostics(model, drawn):
    val, _ = sets(drawn)
    found = diagnose(model, val)
    assert list(found["curves"]) == ["backbone features", "codes", "CRF kernel"]
    assert all(found["base_rate"] < curve["average_precision"] <= 1 for curve in found["curves"].values())
    couplings = np.array(found["couplings"]["codes"])
    assert couplings.shape == (3, 3) and couplings.sum() > 400  # 4 images of up to 121 positions
    assert np.trace(couplings) / couplings.sum() > 0.6  # couplings mostly join equal labels
