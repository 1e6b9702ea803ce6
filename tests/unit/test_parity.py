"""Measures of likeness; every expected figure was worked out by hand."""

import math

import numpy as np
import pytest

from platforms.errors import TensorError
from platforms.parity import (
    Likeness,
    Parity,
    compare_output,
    compute_cosine,
    compute_sqnr_db,
    compute_top_k_agreement,
    find_worst,
    judge_likeness,
)

NAN = math.nan


def test_sqnr_is_the_ratio_of_powers_in_decibels() -> None:
    # Signal 3² + 4² = 25, noise 0.5² = 0.25: a factor of 100 is 20 dB.
    assert compute_sqnr_db(np.array([3.0, 4.0]), np.array([3.0, 4.5])) == pytest.approx(20.0)
    # Noise as strong as the signal.
    assert compute_sqnr_db(np.array([2.0]), np.array([0.0])) == pytest.approx(0.0)
    # Noise of twice the amplitude: −10·log10(4).
    assert compute_sqnr_db(np.array([2.0]), np.array([-2.0])) == pytest.approx(-6.0206, abs=1e-4)


def test_sqnr_is_that_of_onnx_runtime_s_own_tool() -> None:
    from onnxruntime.quantization import qdq_loss_debug

    rng = np.random.default_rng(3)
    reference = rng.standard_normal((7, 11))
    candidate = reference + 0.03 * rng.standard_normal((7, 11))
    theirs = qdq_loss_debug.compute_signal_to_quantization_noice_ratio(reference, candidate)
    assert compute_sqnr_db(reference, candidate) == pytest.approx(float(theirs))


def test_sqnr_has_an_answer_at_its_edges() -> None:
    zero, one = np.array([0.0]), np.array([1.0])
    assert compute_sqnr_db(one, one) == math.inf
    assert compute_sqnr_db(zero, zero) == math.inf
    assert compute_sqnr_db(zero, one) == -math.inf
    assert math.isnan(compute_sqnr_db(one, np.array([NAN])))


def test_cosine_is_the_mean_over_rows() -> None:
    left = np.array([[1.0, 0.0], [1.0, 0.0], [2.0, 2.0]])
    right = np.array([[0.0, 5.0], [3.0, 0.0], [1.0, 0.0]])
    # 90°, 0° and 45°.
    assert compute_cosine(left, right) == pytest.approx((0 + 1 + math.sqrt(0.5)) / 3)
    assert compute_cosine(np.zeros((2, 3)), np.zeros((2, 3))) == 1.0
    assert compute_cosine(np.zeros((1, 3)), np.ones((1, 3))) == 0.0
    assert math.isnan(compute_cosine(np.ones((1, 2)), np.array([[1.0, NAN]])))


def test_agreement_counts_rows_whose_best_class_is_among_the_best() -> None:
    reference = np.array([[9.0, 5, 1, 0], [0, 9, 5, 1], [1, 0, 9, 5], [5, 1, 0, 9]])
    candidate = np.array([[8.0, 5, 1, 0], [9, 8, 0, 0], [5, 6, 4, 7], [1, 2, 3, 0]])
    # Best of the reference: 0, 1, 2, 3; their ranks in the candidate: 1, 2, 4, 4.
    shares = [compute_top_k_agreement(reference, candidate, k) for k in (1, 2, 3, 4)]
    assert shares == [0.25, 0.5, 0.5, 1.0]


def test_collapsed_candidate_does_not_agree_by_its_ties() -> None:
    reference = np.eye(10)
    constant = np.full((10, 10), 0.1)
    assert compute_top_k_agreement(reference, constant, 1) == 0.1
    assert compute_top_k_agreement(reference, constant, 5) == 0.5


def test_row_with_nan_agrees_with_nothing() -> None:
    reference = np.array([[1.0, 0.0], [1.0, 0.0]])
    candidate = np.array([[1.0, 0.0], [1.0, NAN]])
    assert compute_top_k_agreement(reference, candidate, 2) == 0.5
    assert compute_top_k_agreement(candidate, reference, 1) == 0.5


def test_output_of_a_classifier_gets_every_measure() -> None:
    reference = np.array([[3.0, 4.0], [0.0, 1.0]], np.float32)
    candidate = np.array([[3.0, 4.5], [1.0, 0.0]], np.float32)
    found = compare_output("scores", reference, candidate)
    assert (found.rows, found.is_identical, found.k) == (2, False, 2)
    assert (found.max_abs, found.mean_abs) == (1.0, 0.625)
    # Signal 9 + 16 + 1 = 26, noise 0.25 + 1 + 1 = 2.25.
    assert found.sqnr_db == pytest.approx(10 * math.log10(26 / 2.25))
    assert (found.top_1, found.top_k) == (0.5, 1.0)


def test_output_that_is_no_row_of_scores_has_no_agreement() -> None:
    for shape in ((4,), (2, 1), (2, 3, 3), ()):
        array = np.ones(shape, np.float32)
        found = compare_output("y", array, array)
        assert (found.top_1, found.top_k, found.is_identical) == (None, None, True)


def test_whole_numbers_do_not_wrap_around() -> None:
    found = compare_output("y", np.array([0, 255], np.uint8), np.array([255, 0], np.uint8))
    assert found.max_abs == 255.0


def test_texts_are_equal_or_not() -> None:
    left = np.array(["cat", "dog", "cow", "hen"], object)
    right = np.array(["cat", "dog", "cow", "fox"], object)
    assert compare_output("label", left, right).top_1 == 0.75
    same = compare_output("label", left, left)
    assert same.is_identical
    assert judge_likeness([same]) is Likeness.IDENTICAL
    # Texts have no distance that could drag a verdict down.
    most = compare_output("label", np.repeat(left, 25), np.repeat(left, 25))
    assert find_worst([most, make_parity(0.97, 12.0)]) == (0.97, 12.0)
    with pytest.raises(TensorError, match="texts"):
        compare_output("label", left, np.zeros(4))


def test_other_shape_is_refused() -> None:
    with pytest.raises(TensorError, match=r"\[1, 2\].*\[2, 1\]"):
        compare_output("y", np.zeros((1, 2)), np.zeros((2, 1)))


def make_parity(top_1: float | None, sqnr_db: float, *, is_identical: bool = False) -> Parity:
    return Parity("y", 1, is_identical, sqnr_db, 0.0, 0.0, 1.0, top_1)


@pytest.mark.parametrize(
    ("top_1", "sqnr_db", "word"),
    [
        (1.0, 60.0, Likeness.ROUNDING),
        (None, 60.0, Likeness.ROUNDING),
        (0.999, 60.0, Likeness.ALIKE),
        (0.99, 20.0, Likeness.ALIKE),
        (0.99, 19.9, Likeness.SIMILAR),
        (0.95, 30.0, Likeness.SIMILAR),
        (0.949, 30.0, Likeness.DIFFERENT),
        (1.0, 9.9, Likeness.DIFFERENT),
        (None, NAN, Likeness.DIFFERENT),
    ],
)
def test_word_for_likeness_needs_agreement_and_sqnr(
    top_1: float | None, sqnr_db: float, word: Likeness
) -> None:
    assert judge_likeness([make_parity(top_1, sqnr_db)]) is word


def test_worst_output_decides() -> None:
    same = make_parity(1.0, math.inf, is_identical=True)
    assert judge_likeness([same, same]) is Likeness.IDENTICAL
    assert judge_likeness([same, make_parity(None, 12.0)]) is Likeness.SIMILAR
    assert find_worst([same, make_parity(None, 12.0)]) == (1.0, 12.0)
    assert find_worst([make_parity(0.5, NAN), same]) == (0.5, -math.inf)


def test_json_form_holds_no_infinity() -> None:
    document = make_parity(None, math.inf, is_identical=True).to_json()
    assert (document["sqnr_db"], document["is_identical"]) == (None, True)
