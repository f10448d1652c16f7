"""Download the BraTS data: MSD Task01_BrainTumour, 484 training and 266 test cases, about 7.6 GB.

    python download_brats_data.py -e config/environment.json

downloads the archive to the environment file's `data_base_dir`, checks its MD5, unpacks it to
`data_base_dir/Task01_BrainTumour` and deletes the archive. It needs twice the archive's size of disk space.
After an interruption run the same command again: the download resumes, the unpacking starts again. A complete
data set is left as it is.

From a mirror, or from a copy on a disk (the MD5 of the same file is the same):

    python download_brats_data.py -e config/environment.json --url https://mirror.example.org/Task01_BrainTumour.tar
    python download_brats_data.py -e config/environment.json --url file:///media/disk/Task01_BrainTumour.tar

Exit codes: 0 done, 1 network, server or disk failed, 2 wrong usage or a wrong file.
"""

import argparse
import sys

import utils
from ldm.data.download import fetch_task01


@utils.command
def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-e", "--environment-file", required=True, help="JSON file that names data_base_dir")
    parser.add_argument(
        "--url", help="address of the archive, an uncompressed tar (default: the one in MONAI)"
    )
    parser.add_argument("--md5", help="its MD5 (default: the one in MONAI)")
    args = parser.parse_args(argv)

    environment = utils.load_environment(args.environment_file)
    try:
        folder = fetch_task01(environment["data_base_dir"], args.url, args.md5)
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from error
    except KeyboardInterrupt:
        print("stopped: run the same command again to resume", file=sys.stderr)
        raise SystemExit(1) from None
    print(f"The data set is in {folder}")


if __name__ == "__main__":
    main()
