// Run a bundle for LiteRT on Android: its manifest, its preprocessing, its levels.
//
//   dependencies { implementation("com.google.ai.edge.litert:litert:1.4.0") }
package deploykit.example

import android.graphics.Bitmap
import java.io.Closeable
import java.io.File
import java.nio.ByteBuffer
import java.nio.ByteOrder
import org.json.JSONArray
import org.json.JSONObject
import org.tensorflow.lite.DataType
import org.tensorflow.lite.Interpreter
import org.tensorflow.lite.Tensor

/** A feature level; [stride] in pixels of the image. */
data class Level(val name: String, val index: Int, val channels: Int, val stride: Int)

/** What a bundle says of its engine. */
class Manifest(folder: File) {
    private val json = JSONObject(File(folder, "manifest.json").readText())
    private val image: JSONObject = json.getJSONObject("input")
    private val how: JSONObject = image.getJSONObject("preprocessing")

    init {
        require(json.getInt("schema_version") == 1) { "the bundle is of a newer deploykit" }
        require(json.getString("runtime") == "litert") { "the bundle is for ${json.getString("runtime")}" }
    }

    val engine = File(folder, json.getString("engine"))
    val input: String = image.getString("name")
    val height = image.getInt("height")
    val width = image.getInt("width")

    /** The engine takes uint8 (1, H, W, 3) and normalises by itself; else it takes (1, 3, H, W). */
    val takesPixels = image.getString("dtype") == "uint8"

    /** Of RGB in 0 to 1. */
    val mean = floats(how.getJSONArray("mean"))
    val std = floats(how.getJSONArray("std"))

    /** Resize to size / [cropPct] and crop to size: `center` keeps the aspect ratio, `squash` does not. */
    val cropPct = how.getDouble("crop_pct")
    val cropMode: String = how.getString("crop_mode")

    val levels: Map<String, Level> = objects(json.getJSONObject("backbone").getJSONArray("levels")).associate {
        val name = it.getString("name")
        name to Level(name, it.getInt("index"), it.getInt("channels"), it.getInt("stride"))
    }
    val outputs: List<String> = objects(json.getJSONArray("outputs")).map { it.getString("name") }

    private fun floats(array: JSONArray) = FloatArray(array.length()) { array.getDouble(it).toFloat() }

    private fun objects(array: JSONArray) = List(array.length()) { array.getJSONObject(it) }
}

/** One output in float32. */
class Feature(val shape: IntArray, val values: FloatArray)

/** An engine in LiteRT, on the CPU. One call at a time. */
class Backbone(folder: File, threads: Int) : Closeable {
    val manifest = Manifest(folder)
    private val interpreter = Interpreter(manifest.engine, Interpreter.Options().setNumThreads(threads))
    private val signature = interpreter.signatureKeys.single()

    /** Return every output by name; [image] is of the engine's size, resized and cropped as the manifest says. */
    fun run(image: Bitmap): Map<String, Feature> {
        require(image.width == manifest.width && image.height == manifest.height) {
            "the image is ${image.width}x${image.height}; the engine takes ${manifest.width}x${manifest.height}"
        }
        val tensors = manifest.outputs.associateWith { interpreter.getOutputTensorFromSignature(it, signature) }
        val buffers = tensors.mapValues { (_, tensor) -> direct(tensor.numBytes()) }
        val written = HashMap<String, Any>(buffers)
        interpreter.runSignature(mapOf<String, Any>(manifest.input to pixelsOf(image)), written, signature)
        return tensors.mapValues { (name, tensor) -> Feature(tensor.shape(), floats(tensor, buffers.getValue(name))) }
    }

    override fun close() = interpreter.close()

    /** Write RGB as the engine's input: pixels, normalised floats, or these in the engine's int8. */
    private fun pixelsOf(image: Bitmap): ByteBuffer {
        val colors = IntArray(image.width * image.height)
        image.getPixels(colors, 0, image.width, 0, 0, image.width, image.height)
        val tensor = interpreter.getInputTensorFromSignature(manifest.input, signature)
        val buffer = direct(tensor.numBytes())
        if (manifest.takesPixels) {
            for (color in colors) for (channel in 0..2) buffer.put(channelOf(color, channel).toByte())
        } else {
            for (channel in 0..2) for (color in colors) put(buffer, tensor, normalized(color, channel))
        }
        buffer.rewind()
        return buffer
    }

    private fun normalized(color: Int, channel: Int) =
        (channelOf(color, channel) / 255f - manifest.mean[channel]) / manifest.std[channel]

    /** ARGB to red, green or blue. */
    private fun channelOf(color: Int, channel: Int) = color shr (16 - 8 * channel) and 0xff

    private fun put(buffer: ByteBuffer, tensor: Tensor, value: Float) {
        if (tensor.dataType() == DataType.FLOAT32) {
            buffer.putFloat(value)
            return
        }
        val range = tensor.quantizationParams()
        val integer = Math.rint((value / range.scale).toDouble()).toInt() + range.zeroPoint
        buffer.put(integer.coerceIn(-128, 127).toByte())
    }

    private fun floats(tensor: Tensor, buffer: ByteBuffer): FloatArray {
        buffer.rewind()
        if (tensor.dataType() == DataType.FLOAT32) {
            return FloatArray(tensor.numElements()).also { buffer.asFloatBuffer().get(it) }
        }
        val range = tensor.quantizationParams()
        return FloatArray(tensor.numElements()) { (buffer.get(it) - range.zeroPoint) * range.scale }
    }

    private fun direct(bytes: Int): ByteBuffer = ByteBuffer.allocateDirect(bytes).order(ByteOrder.nativeOrder())
}
