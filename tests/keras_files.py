"""Writes files as Keras saves them and what its models compute, for test_keras_hdf5.py.

    python tests/keras_files.py FOLDER [--kerascv]

Runs where Keras is installed; nothing else of this package is needed. FOLDER gets a ConvMixer of few channels with
weights and statistics drawn at random, its images and its outputs. keras_files.zip holds the folders of

- ``kerascv``: keras-cv 0.9.0 with tensorflow-cpu and tf_keras 2.21.0, ``TF_USE_LEGACY_KERAS=1``, ``--kerascv``
- ``keras2``: tensorflow-cpu 2.12.0 with its own Keras
- ``keras3``: keras 3.15.1 with torch, ``KERAS_BACKEND=torch``

without the second file of a layout, made by ``python -m zipfile -c tests/keras_files.zip kerascv keras2 keras3``.
"""
import argparse
from pathlib import Path
from typing import Any

import numpy as np

# Over ten BatchNorms, so that their order is not that of their names as text; an even kernel; a patch that does not
# divide the sides of the images.
SIZES = dict(dim=6, depth=5, kernel_size=4, patch_size=3)
NUM_CLASSES = 5


def kerascv_model(include_top: bool) -> Any:
    from keras_cv.src.models.legacy.convmixer import ConvMixer

    return ConvMixer(
        **SIZES, include_top=include_top, include_rescaling=True, num_classes=NUM_CLASSES if include_top else None,
        classifier_activation=None)


def keras_model(include_top: bool) -> Any:
    """The same model out of Keras's own layers."""
    import keras
    from keras import layers

    def activated(x: Any) -> Any:
        return layers.BatchNormalization()(layers.Activation('gelu')(x))

    inputs = keras.Input((None, None, 3))
    x = layers.Rescaling(1 / 255)(inputs)
    x = activated(layers.Conv2D(SIZES['dim'], SIZES['patch_size'], strides=SIZES['patch_size'])(x))
    for _ in range(SIZES['depth']):
        mixed = activated(layers.DepthwiseConv2D(SIZES['kernel_size'], padding='same')(x))
        x = layers.Add()([mixed, x])
        x = activated(layers.Conv2D(SIZES['dim'], 1)(x))
    if include_top:
        x = layers.Dense(NUM_CLASSES)(layers.GlobalAveragePooling2D()(x))
    return keras.Model(inputs, x)


def draw_weights(model: Any) -> None:
    """Give every weight random values; the variances are so small that the epsilon added to them is felt."""
    rng = np.random.default_rng(0)
    for layer in model.layers:
        # Convolutions and the head have two weights: kernel and bias. BatchNorms have gamma, beta, mean and variance.
        shapes = [weight.shape for weight in layer.get_weights()]
        if len(shapes) == 2:
            fan_in = np.prod(shapes[0][:2] if shapes[0][-1] == 1 else shapes[0][:-1])
            layer.set_weights([rng.normal(0, fan_in ** -0.5, shapes[0]), rng.normal(0, 0.2, shapes[1])])
        elif shapes:
            layer.set_weights([
                rng.uniform(0.1, 0.3, shapes[0]), rng.normal(0, 0.3, shapes[1]), rng.normal(0.1, 0.1, shapes[2]),
                rng.uniform(1e-3, 2e-2, shapes[3])])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('folder', type=Path)
    parser.add_argument('--kerascv', action='store_true', help="KerasCV's class, not Keras's layers")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    build = kerascv_model if args.kerascv else keras_model

    images = np.random.default_rng(1).integers(0, 256, (2, 13, 16, 3), dtype=np.uint8)
    np.save(args.folder / 'images.npy', images)
    build(include_top=True)  # so that Keras does not begin the names of the layers at zero
    for name, include_top in (('model', True), ('headless', False)):
        model = build(include_top)
        draw_weights(model)
        outputs = model.predict(images.astype(np.float32), verbose=0)
        np.save(args.folder / f'{name}.npy', np.asarray(outputs))
        model.save_weights(args.folder / f'{name}.weights.h5')
        model.save(args.folder / f'{name}.h5')
        try:
            model.save_weights(args.folder / f'{name}_by_name.h5')
        except ValueError:
            pass  # Keras 3 saves nothing but .weights.h5


if __name__ == '__main__':
    main()
