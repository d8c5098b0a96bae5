"""Write three hospitals' tumour measurements as CSV files: `python examples/deploy/make_data.py FOLDER`.

The rows are those of scikit-learn's breast cancer data, dealt out so that the hospitals differ in size and case mix.
"""

import sys
from pathlib import Path

from sklearn.datasets import load_breast_cancer

COLUMNS = ["mean radius", "mean texture", "mean smoothness", "mean concavity", "worst area", "worst concave points"]


def main(folder: Path) -> None:
    tumours = load_breast_cancer(as_frame=True)
    frame = tumours.data[COLUMNS].assign(malignant=1 - tumours.target)
    ill, well = frame[frame.malignant == 1], frame[frame.malignant == 0]
    shares = {"north": (0, 110, 0, 130), "south": (110, 170, 130, 270), "west": (170, 212, 270, 357)}
    folder.mkdir(parents=True, exist_ok=True)
    for name, (ill_from, ill_to, well_from, well_to) in shares.items():
        rows = ill.iloc[ill_from:ill_to].index.union(well.iloc[well_from:well_to].index)
        frame.loc[rows].to_csv(folder / f"{name}.csv", index=False)
        print(f"{folder / f'{name}.csv'}: {len(rows)} rows")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
