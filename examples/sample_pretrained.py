"""Sample images from a pretrained model in diffusers' format: `python examples/sample_pretrained.py FOLDER`.

Such as Ho et al.'s own for CIFAR-10, which the tool of the Hugging Face hub fetches (`pip install huggingface_hub`; it
is not needed for anything else):

    hf download google/ddpm-cifar10-32 --local-dir ddpm-cifar10-32
    python examples/sample_pretrained.py ddpm-cifar10-32

Older versions of the tool are called by `huggingface-cli download ...`. Others are google/ddpm-celebahq-256, -cat-256,
-church-256 and -bedroom-256, or what `save_diffusers` wrote. FOLDER may also be a safetensors file with the names of Ho
et al.'s code.
"""

import time

import numpy as np

from tinyddpm import cli, load_diffusers, load_original, sample
from tinyddpm.diffusion.sample import SAMPLERS
from tinyddpm.files.pictures import grid, save_picture


def parse_arguments():
    parser = cli.Options(__doc__)
    add = parser.add
    add("folder", metavar="FOLDER", type=cli.any_path, help="a pipeline or a model that diffusers saved")
    add("--samples", type=int, default=16, least=1, most=cli.SAMPLES, help="how many images [%(default)s]")
    add("--method", default="ddim", choices=SAMPLERS, help="the sampler [%(default)s]")
    add("--steps", type=int, least=1, help="of the sampler [50; all of them for ddpm]")
    add("--label", type=int, help="the class of the images, for a model that knows classes [each in turn]")
    add("--size", type=int, least=1, most=4096, help="their height and width [those of the model]")
    add("--variant", help="another file of weights in the folder, such as fp16")
    add("--device", default="cpu", help="cpu, cuda or cuda:N [%(default)s]")
    add("--precision", default="float32", help="of products on a GPU: float32, tf32, bf16 or fp16 [%(default)s]")
    parser.add_usual(out="pretrained.png", gives="other images")
    args = parser.parse_args()
    if not args.folder.exists():
        parser.error(
            f"FOLDER: there is no {args.folder}. To fetch Ho et al.'s model for CIFAR-10: hf download "
            "google/ddpm-cifar10-32 --local-dir ddpm-cifar10-32 (with older versions: huggingface-cli download ...)"
        )
    return args


def main():
    args = parse_arguments()
    unet, diffusion = load_original(args.folder) if args.folder.is_file() else load_diffusers(args.folder, args.variant)
    unet.to(args.device, precision=args.precision)
    height, width = (args.size, args.size) if args.size else unet.config["image_size"] or (None, None)
    if height is None:
        raise ValueError("--size: this model does not say how large its images are, so it has to be given")
    if args.label is not None and not unet.config["classes"]:
        raise ValueError("--label: this model knows no classes, so leave it out")
    if args.label is not None and not 0 <= args.label < unet.config["classes"]:
        raise ValueError(f"--label: this model knows 0 to {unet.config['classes'] - 1}, got {args.label}")
    steps = (diffusion.T if args.method == "ddpm" else min(50, diffusion.T)) if args.steps is None else args.steps
    print(f"network  U-Net {'-'.join(map(str, unet.config['channels']))}, {unet.size:,} parameters")
    print(f"process  {diffusion.schedule}, the network predicts {diffusion.objective}, variance {diffusion.variance}")
    how = f"{args.method} in {steps} steps, spacing {diffusion.spacing}, clip {diffusion.clip}"
    print(f"images   {args.samples} of {height} x {width} pixels, {how}", flush=True)

    labels = None
    if args.label is not None:
        labels = np.full(args.samples, args.label)
    elif unet.config["classes"]:
        labels = np.arange(args.samples) % unet.config["classes"]

    began = time.monotonic()
    settings = {"rng": args.seed, "workers": args.workers, "labels": labels, "progress": True}
    shape = (args.samples, height, width, unet.config["in_channels"])
    images = sample(diffusion, unet, shape, args.method, steps, **settings)
    save_picture(args.out, grid(images, scale=1 if height >= 128 else 2))
    print(f"done in {time.monotonic() - began:.0f} seconds: look at {args.out}")


if __name__ == "__main__":
    cli.run(main)
