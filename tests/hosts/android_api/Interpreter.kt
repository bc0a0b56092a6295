// Declares what examples/hosts/android uses of LiteRT (Interpreter, Tensor and DataType of its Java API).
package org.tensorflow.lite

import java.io.File

enum class DataType { FLOAT32, INT8, UINT8 }

interface Tensor {
    interface QuantizationParams {
        val scale: Float
        val zeroPoint: Int
    }

    fun dataType(): DataType

    fun numBytes(): Int

    fun numElements(): Int

    fun quantizationParams(): QuantizationParams

    fun shape(): IntArray
}

class Interpreter(file: File, @Suppress("UNUSED_PARAMETER") options: Options) : AutoCloseable {
    class Options {
        fun setNumThreads(threads: Int): Options = TODO("$threads")
    }

    val signatureKeys: Array<String> = TODO("$file")

    fun getInputTensorFromSignature(name: String, signature: String): Tensor = TODO(name + signature)

    fun getOutputTensorFromSignature(name: String, signature: String): Tensor = TODO(name + signature)

    fun runSignature(inputs: Map<String, Any>, outputs: Map<String, Any>, signature: String): Unit =
        TODO("$inputs$outputs$signature")

    override fun close() = Unit
}
