"""The usual recipe in PyTorch, to compare with: `python examples/measure/pytorch_digits.py`, then `python
examples/measure/evaluate_digits.py pytorch_digits.npz`.

It is what one finds in tutorials: diffusers' U-Net predicts the noise, without labels, on a linear schedule; batches of
128 images of all of MNIST, AdamW, an average of the weights, 50 steps of DDIM. It trains for as long as mnist_ddpm.py
does, on as many threads as PyTorch takes, in the layout of memory that is faster for it. The learning rate falls over
the second half, as there. It needs the extra `peers`, and MNIST, 11 MB to fetch.
"""

import copy
import time

import numpy as np

from tinyddpm import cli
from tinyddpm.bar import progress_bar
from tinyddpm.files.data import load_mnist
from tinyddpm.files.replacing import replacing


def parse_arguments():
    parser = cli.Options(__doc__)
    add = parser.add
    add("--minutes", type=float, default=5, above=0, help="of training [%(default)s]")
    add("--lr", type=float, default=2e-3, above=0, help="AdamW's learning rate at first [%(default)s]")
    add("--samples", type=int, default=500, least=1, help="how many digits to draw [%(default)s]")
    add("--threads", type=int, least=1, help="of PyTorch [as many as it likes]")
    add("--seed", type=int, default=0, least=0, help="another one gives other digits [%(default)s]")
    add("--out", type=cli.any_path, default="pytorch_digits.npz", help="the digits [%(default)s]")
    return parser.parse_args()


def main():
    args = parse_arguments()
    import torch
    from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel

    torch.manual_seed(args.seed)
    if args.threads:
        torch.set_num_threads(args.threads)
    images, _ = load_mnist(full=True)
    images = torch.from_numpy(images).permute(0, 3, 1, 2)  # (60000, 1, 28, 28)
    unet = UNet2DModel(
        sample_size=28,
        in_channels=1,
        out_channels=1,
        layers_per_block=2,
        block_out_channels=(16, 32, 64),
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    ).to(memory_format=torch.channels_last)
    average, scheduler = copy.deepcopy(unet), DDPMScheduler(1000)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=args.lr)

    began, step, gone = time.monotonic(), 0, 0.0  # `gone`: how much of the time
    with progress_bar(desc="training", unit="step") as bar:
        while gone < 1:
            for group in optimizer.param_groups:
                group["lr"] = args.lr * min(1, 2 * (1 - gone))
            x0 = images[torch.randint(len(images), (128,))].to(memory_format=torch.channels_last)
            t, eps = torch.randint(1000, (128,)), torch.randn(x0.shape)
            loss = torch.nn.functional.mse_loss(unet(scheduler.add_noise(x0, eps, t), t).sample, eps)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
            optimizer.step()
            step += 1
            with torch.no_grad():
                for mean, parameter in zip(average.parameters(), unet.parameters()):
                    mean.lerp_(parameter, 1 - min(0.999, (1 + step) / (10 + step)))
            gone = (time.monotonic() - began) / (60 * args.minutes)
            bar.set_postfix_str(f"loss {loss.item():.4f}", refresh=False)
            bar.update()
    print(f"trained  {step:,} steps in {args.minutes:g} minutes on {torch.get_num_threads()} threads", flush=True)

    ddim, digits = DDIMScheduler(1000), []
    ddim.set_timesteps(50)
    average.eval()
    with torch.no_grad():
        for count in np.diff([*range(0, args.samples, 100), args.samples]):
            x = torch.randn(int(count), 1, 28, 28)
            for t in progress_bar(ddim.timesteps, "sampling", unit="step"):
                x = ddim.step(average(x, t).sample, t, x).prev_sample
            digits.append(x.clamp(-1, 1).permute(0, 2, 3, 1).numpy())
    with replacing(args.out) as (unfinished,), open(unfinished, "wb") as file:
        np.savez(file, images=np.concatenate(digits))
    print(f"{args.samples} digits are in {args.out}: python examples/measure/evaluate_digits.py {args.out}")


if __name__ == "__main__":
    cli.run(main, needs="PyTorch and diffusers, pip install -e '.[peers]'")
