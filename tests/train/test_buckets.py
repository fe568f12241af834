"""The sizes that images take, and how they are resized: by cases written by hand."""

import numpy as np
import pytest

from fluxjax.train.buckets import (
    bucket_sizes,
    covering_box,
    nearest_bucket,
    resize_to_cover,
    token_means,
)


def test_sizes_of_a_small_area():
    # 64 * 64 = 4096 pixels in tokens of 16: 48 x 85.3 -> 80; 32 x 128 is 1 : 4.
    assert bucket_sizes(64, max_ratio=2.0) == ((80, 48), (64, 64), (48, 80))


def test_sizes_of_1024_are_multiples_of_64_and_have_about_its_area():
    sizes = bucket_sizes(1024)
    assert (1024, 1024) in sizes
    shorter = [height for height, width in sizes if height < width]
    assert shorter == [960, 896, 832, 768]
    for height, width in sizes:
        assert (width, height) in sizes
        assert height % 64 == width % 64 == 0
        assert max(height, width) <= 2 * min(height, width)
        assert abs(height * width / 1024**2 - 1) < 0.02


def test_a_ratio_of_one_leaves_the_square():
    assert bucket_sizes(128, max_ratio=1) == ((128, 128),)


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        ({"side": 100}, "multiples of 16"),
        ({"side": 128, "step": 24}, "needs a multiple of 16 pixels that divides"),
        ({"side": 128, "max_ratio": 0.5}, "from 1 to 16"),
    ],
)
def test_other_sizes_are_refused(arguments, rule):
    with pytest.raises(ValueError, match=rule):
        bucket_sizes(**arguments)


@pytest.mark.parametrize(
    ("image", "size"),
    [
        ((500, 500), (64, 64)),
        ((1000, 600), (80, 48)),  # exactly its proportions
        ((600, 1000), (48, 80)),
        ((100, 5), (80, 48)),  # beyond all of them
        ((64, 82), (64, 64)),  # log 1.28 = 0.25 is nearer to 0 than to log 1.67 = 0.51
        ((64, 83), (48, 80)),  # the middle between both is 1.29
    ],
)
def test_the_nearest_proportions_are_taken(image, size):
    assert nearest_bucket(*image, bucket_sizes(64)) == size


def test_of_equally_near_sizes_the_larger_one_is_taken():
    assert nearest_bucket(10, 10, ((16, 32), (32, 16), (32, 64))) == (32, 64)


def test_the_part_in_the_middle_has_the_proportions():
    assert covering_box(100, 100, (32, 64)) == (0, 25, 100, 75)
    assert covering_box(100, 300, (64, 64)) == (100, 0, 200, 100)


def test_resizing_covers_and_crops_around_the_middle():
    image = np.zeros((32, 96, 3), np.float32)
    image[:, 32:64] = 1
    np.testing.assert_allclose(resize_to_cover(image, (16, 16)), 1, atol=0.06)  # Lanczos rings
    assert resize_to_cover(image, (32, 96)) is image


def test_a_mask_counts_each_token_by_its_pixels():
    mask = np.zeros((16, 48), np.float32)
    mask[:8, :16], mask[:, 32:] = 1, 1
    np.testing.assert_array_equal(token_means(mask), [0.5, 0, 1])
