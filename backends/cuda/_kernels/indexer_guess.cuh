// What the scoring in two parts and the selection from its lists agree on.

#pragma once

constexpr int EVERY = 16, DRAWN = 8;  // of so many tiles this one is of the sample
constexpr int WIDTH = 64;             // keys of a tile, and lists of a row

struct Guess {
    float floor;  // scores of a row below it were not kept
    int sampled;  // how many of its sample reach it
};
