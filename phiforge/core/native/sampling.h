// Draws one token per row from logits: temperature, min-p, inverse distribution function.
#pragma once
#include "common.h"
